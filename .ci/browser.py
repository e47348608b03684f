"""Open the rendered pages in headless Chromium, where it is installed, and say what a reader would see go wrong."""
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from threading import Thread

PHONE, DESKTOP = 390, 1280
PATIENCE = 300 # seconds
VISITOR = """<!DOCTYPE html><meta charset="utf-8"><title>visitor</title><iframe id="frame" height="844"></iframe><script>
const frame = document.getElementById("frame"), sights = []
const open = (page, width) => new Promise(done => { frame.width = width; frame.onload = done; frame.src = page })
const name = part => part.id || part.className || part.tagName.toLowerCase()
async function visit(pages, widths) {
  for (const page of pages) for (const width of widths) {
    await open("/" + page, width)
    const root = frame.contentDocument.documentElement
    const wide = [...root.querySelectorAll("main *")].filter(part => part.getBoundingClientRect().right > root.clientWidth + 1)
    sights.push({page, width, sideways: root.scrollWidth - root.clientWidth, widest: wide.length ? name(wide[0]) : "",
                 broken: [...frame.contentDocument.images].filter(image => !image.naturalWidth).map(image => image.getAttribute("src").slice(0, 80))})
  }
  fetch("/", {method: "POST", body: JSON.stringify(sights)})
}
visit(%s, %s)
</script>"""


def chromium():
    "Path of an installed Chromium or Chrome; None where there is none."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Handler(SimpleHTTPRequestHandler):
    "Files of a folder, one page from memory as /visitor, and a box for what that page reports."
    def __init__(self, *args, visitor, reports, **kwargs):
        self.visitor, self.reports = visitor, reports
        super().__init__(*args, **kwargs)

    def do_GET(self):
        if self.path != "/visitor":
            return super().do_GET()
        self.answer(self.visitor.encode())

    def do_POST(self):
        self.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(b"")

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def served(folder, visitor, reports):
    "Address of a server of the files in `folder` on this machine."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder, visitor=visitor, reports=reports))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def opened(url):
    "Headless Chromium showing `url`, with a profile of its own."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        rights = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [chromium(), "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}", *rights, url]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def look_at(folder, pages, widths=(PHONE, DESKTOP)):
    "What Chromium sees on every one of `pages` below `folder` at every width, as dictionaries."
    reports = Queue()
    with served(folder, VISITOR % (json.dumps(sorted(pages)), json.dumps(widths)), reports) as address, opened(f"{address}/visitor") as process:
        late = time.monotonic() + PATIENCE
        while reports.empty():
            if process.poll() is not None or time.monotonic() > late:
                raise TimeoutError(f"Chromium did not get through {len(pages)} page(s); it {'ended by itself' if process.poll() is not None else f'took more than {PATIENCE} s'}")
            time.sleep(0.1)
        return reports.get()


def check_sights(folder, pages, sources):
    "Messages about pages that must be moved sideways, and pictures that are not shown."
    try:
        sights = look_at(folder, pages)
    except TimeoutError as error:
        return [str(error)]
    found = []
    for sight in sights:
        where = f"{sources[sight['page']]}: at {sight['width']} pixels"
        if sight["sideways"] > 0:
            found.append(f"{where} the page is {sight['sideways']} pixels too wide; the first wide part is {sight['widest'] or 'not in the text'}")
        found += [f"{where} the picture {url} is not shown" for url in sight["broken"]]
    return found
