"""Names of a lab's files, also for commands that do not know yet whether there is a lab: nothing is imported here.

Spec: `lab_site` says what is in a lab's folder.
"""

TOPOLOGY_FILE = "lab.yml"
"""What a person writes (`lab_topology`)."""
FOLDER = ".lab"
"""Where the state of a lab lives when its topology does not say otherwise: beside that file."""
SITE_FILE = "site.yml"
"""What the command line reads (`config.SiteSettings`)."""
RECORD_FILE = "lab.json"
"""What the lab remembers between two starts (`lab_record`)."""
