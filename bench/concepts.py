"""A thousand phrases that are all different, and what each becomes."""

from __future__ import annotations

# fmt: off
_LOOKS = [
    "red", "blue", "green", "yellow", "purple", "golden", "silver", "wooden", "broken", "ancient",
    "modern", "tiny", "giant", "frozen", "burning", "shiny", "rusty", "dirty", "clean", "painted",
    "striped", "spotted", "furry", "smooth", "rough", "empty", "crowded", "quiet", "stormy",
    "sunny", "foggy", "snowy", "haunted", "royal", "rural", "tropical", "electric", "plastic",
    "marble", "velvet",
]
_THINGS = [
    "dog", "cat", "horse", "eagle", "dolphin", "castle", "bridge", "lighthouse", "cathedral",
    "garden", "forest", "mountain", "river", "bicycle", "locomotive", "sailboat", "airplane",
    "guitar", "teapot", "umbrella", "typewriter", "robot", "wizard", "dancer", "marketplace",
]
# fmt: on


def phrase_pairs(number: int) -> list[tuple[str, str]]:
    """So many (at most 1,000), such as ("red dog", "sketch of a velvet marketplace").

    Each becomes a phrase that is nobody else's and never edited itself, so that no prompt serves
    twice: the most an edit of so many concepts can have to read.
    """
    phrases = [f"{look} {thing}" for look in _LOOKS for thing in _THINGS]
    goals = [f"sketch of a {phrase}" for phrase in reversed(phrases)]
    step = len(phrases) // number  # evenly taken, so that few are as different as many
    return list(zip(phrases, goals, strict=True))[::step][:number]
