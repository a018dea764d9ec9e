"""Generated from proto/ by scripts/gen: never edited."""
