"""The demo: a real language model learns three small tasks, 0.1 % of its weights for each."""
