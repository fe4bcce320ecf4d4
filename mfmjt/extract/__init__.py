"""From folders of videos or sounds with captions to a feature store."""

__all__: list[str] = []
