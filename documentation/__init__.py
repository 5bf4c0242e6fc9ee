"""What makes and checks the site (``make docs``, ``make docs-check``), and its pages and pictures that code makes."""
