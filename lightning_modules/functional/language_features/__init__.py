"""Photos to masks, tiles and features."""
