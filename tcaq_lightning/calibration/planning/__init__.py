"""What a run will need before it begins: units, memory, time."""
