"""Random errors that change nothing which a test could see, and why. `tests.plant_errors --random` leaves them out.

An entry names the file, the function, the line as it is, the line as it would be. Lines may move; when one changes, a
test says that the entry is stale.
"""
EQUIVALENT = {
}
