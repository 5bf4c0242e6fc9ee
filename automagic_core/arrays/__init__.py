"""What an array is: its rows and columns, its names, and which states it keeps (sections 1 and 6)."""
