"""Runs that come from, or go to, another optimizer, precision, framework or file."""
