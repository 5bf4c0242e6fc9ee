"""Reports for people: metrics, health, memory, speed."""
