"""How arrays and their states are split over a mesh (`docs/algorithm.md`, section 9.2)."""
