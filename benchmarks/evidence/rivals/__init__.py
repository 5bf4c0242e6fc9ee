"""What people use instead: each as its authors recommend."""

from benchmarks.evidence.rivals.method import Method
from benchmarks.evidence.rivals.recipes import RECIPES

__all__ = ["RECIPES", "Method"]
