"""What a trained model or an embedding means, in features and in cells."""

from coembed.explain.archetypes import Archetypes, archetypes
from coembed.explain.differential import differential_features
from coembed.explain.traversal import traversal

__all__ = ["Archetypes", "archetypes", "differential_features", "traversal"]
