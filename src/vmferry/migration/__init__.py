"""Both sides of a migration: who says what when, and what must hold at each step."""
