"""The command that brings a GPU's evidence home: a parent, and a process for each piece of it."""
