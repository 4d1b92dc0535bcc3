"""oxe-mix: fractions of Open X-Embodiment in, a vision-language-action model out."""

__version__ = "0.1.0"
