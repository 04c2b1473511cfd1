"""Times of operators and of SAM 2 beside what one would call instead, goals for them, and their plots."""
