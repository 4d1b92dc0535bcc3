"""Stage 3: conversations in, a vision-language-action model out; then its actions."""
