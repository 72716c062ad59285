"""The manual, a topic a file in help/: what `oqc help` prints and GET /help/ serves."""
import pkgutil
from typing import Dict, Iterator

# In the order in which somebody who is new reads them. The first line of each is "# NAME: LINE".
TOPICS = ("start", "jobs", "commands", "http", "runtimes", "debugging", "configuration", "keys",
          "operations", "sweeps", "growing", "limits", "changes")


def read() -> Dict[str, str]:
    """Return {topic: its text}; for a server at its start, since the .pyz may be replaced."""
    topics = {}
    for name in TOPICS:
        data = pkgutil.get_data("oqc", f"help/{name}.md")
        assert data is not None
        topics[name] = data.decode()
    return topics


def contents(topics: Dict[str, str]) -> str:
    """Return the list of topics, a line each."""
    lines = []
    for name, text in topics.items():
        title, _, _ = text.partition("\n")
        lines.append(f"{name:15}{title.partition(': ')[2]}\n")
    return "".join(lines)


def places(topics: Dict[str, str], word: str) -> Iterator[str]:
    """Yield "TOPIC:LINE: TEXT" of each line that has a word, upper or lower case."""
    for name, text in topics.items():
        for number, line in enumerate(text.splitlines(), 1):
            if word.lower() in line.lower():
                yield f"{name}:{number}: {line.strip()}"
