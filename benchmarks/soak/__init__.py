"""Long runs, kills and random cases, to find what short tests cannot: ``make soak``; the report is docs/reliability.md."""
