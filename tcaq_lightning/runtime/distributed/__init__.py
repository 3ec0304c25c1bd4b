"""The processes of a run: started, placed on cores, and what they tell each other."""
