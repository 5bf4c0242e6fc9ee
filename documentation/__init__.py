"""What makes and checks the site: ``make docs``, ``make docs-check``, and the pages and pictures that code generates."""
