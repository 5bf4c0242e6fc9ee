"""Long runs, kills and random cases, to find what short tests cannot: ``make soak`` writes docs/reliability.md."""
