"""`fasttrace info`: what this machine offers, for choices and for bug reports."""

from __future__ import annotations

import json
from dataclasses import asdict

from fasttrace import __version__
from fasttrace.cli.options import Json, Quiet

NAME = "info"


def command(quiet: Quiet = False, as_json: Json = False) -> None:
    """Say what of this machine and its libraries can be used."""
    from fasttrace.info import environment

    facts = environment()
    if as_json:
        about = {"fasttrace": __version__, "facts": [asdict(fact) for fact in facts]}
        print(json.dumps(about))
        return
    print(f"fasttrace {__version__}")
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        if fact.present or not quiet:
            print(f"{'yes' if fact.present else 'no ':<3}  {fact.name:<{width}}  {fact.sentence}")
