"""Report of a run: `page` writes the HTML page from the template `page.html`; `charts` and `optuna_plots` draw."""
