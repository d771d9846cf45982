"""The pa-compiler command: its values come from the other rooms, and are printed here."""
