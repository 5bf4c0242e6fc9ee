"""What is asked of a release: that it installs (`make dist-check`), and where it was tried (`make support`)."""
