"""The commands of ``bitune``, a module each: its options (``add``) and what it does. torch loads when one runs."""
