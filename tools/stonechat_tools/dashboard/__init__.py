"""The operator's screen: the fleet in a browser, its metrics, and Home Assistant.

dashboard.py  the verb
view.py       the fleet as browsers show it, read from the collector's database, and what changes
app.py        requests: who may ask what, and the headers of every answer
api.py        what the pages ask for, as JSON
accounts.py   accounts, sessions, the rate of log-ins
audit.py      who did what, as a chain of digests
metrics.py    for Prometheus
static/       the pages: HTML, CSS and JavaScript modules as they are, and uPlot
"""
