"""The local page: compare, classify and search in a browser, and a JSON API for it.

safety.py    every request first: Host, Origin, token, size; every answer: its headers
routes.py    the API: forms in, JSON out
forms.py     what a form holds, with its limits
worker.py    one thread with the model, which takes waiting requests together
heat.py      an image under its map of where the model looked
openapi.py   the API's description
server.py    the address, the process
page/        what the browser gets: HTML, CSS, JavaScript, as they are
"""
