"""Training a run: setup, the loop, recovery, what it prints"""
