"""Shared by all tests."""

from __future__ import annotations

from hypothesis import settings

# Two test processes on two cores: how long one example takes says nothing.
settings.register_profile("coembed", deadline=None)
settings.load_profile("coembed")
