"""The machine: how a Task is launched, stepped, saved and exported. Knows no method."""
