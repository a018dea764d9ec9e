"""Foreign protocols, translated into the same managers. Adapters keep no state."""
