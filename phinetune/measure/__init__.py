"""What is measured by trying it: what a run will need, how much of the machine's speed training reaches, whether a
killed run ends as one that ran through."""
