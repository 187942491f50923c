"""For all tests: properties are held to what is true, never to how fast this machine finds it out."""

from hypothesis import settings

settings.register_profile("tidegate", deadline=None)
settings.load_profile("tidegate")
