"""Nightly regression evaluation: run, measure, compare with the history, report; ``command.py`` is the way in."""
