"""A Hugging Face Space for a OneRec model: set ONEREC_MODEL to its folder or Hub id, and ONEREC_ITEMS to a table of item_id and title."""

import os

from onerec_hf.cli.demo import titles_of
from onerec_hf.cli.demo_app import Recommender, build_app
from onerec_hf.workflows import load_model, load_processor

name = os.environ.get("ONEREC_MODEL")
if not name:
    raise SystemExit("set ONEREC_MODEL: the folder or Hub id of a trained OneRec (in a Space: Settings, Variables)")
items = os.environ.get("ONEREC_ITEMS")
titles = titles_of(items, "title") if items else None
recommender = Recommender(load_model("ONEREC_MODEL", name), load_processor("ONEREC_MODEL", name), titles)
app = build_app(recommender, name=name.rstrip("/").split("/")[-1])

if __name__ == "__main__":
    app.launch()
