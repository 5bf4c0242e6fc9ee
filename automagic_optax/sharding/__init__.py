"""How arrays are split over a mesh, and their states with them."""
