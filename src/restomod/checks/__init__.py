"""Is the model sound, and the machine fit?"""
