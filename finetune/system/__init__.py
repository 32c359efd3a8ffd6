"""Shared by all packages: errors, complete files, fresh processes, ranks, devices, the terminal, pages.

>>> with reworded(ModelError, "model.adapter: cannot be read", ValueError), whole_file(output) as part:
...     part.write_text(render("hub/model_card.md.jinja", markup=False, **values))

The package has no public names: import from its modules.
"""
