"""A local page that shows what a degrader does to one's own photograph.

1. `comparison` cuts a window of a photograph and makes its four pictures: HR, generated LR, bicubic, plain blur.
2. `server` answers the page's requests, on this machine alone.
3. `page.html`, `page.css` and `page.js` are the page. It asks no other host for anything.
4. `run` is the job.
"""
