"""What people look at: metrics, health, memory and speed (docs/algorithm.md, section 13)."""
