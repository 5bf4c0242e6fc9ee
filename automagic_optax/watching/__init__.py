"""What people look at: metrics, health, memory, speed."""
