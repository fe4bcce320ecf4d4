"""The feature store: its format, reader and writer, and the procedural set in one."""

__all__: list[str] = []
