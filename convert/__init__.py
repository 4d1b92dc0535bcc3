"""Stage 2: RLDS in, conversations with action tokens out."""
