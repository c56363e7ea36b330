"""The command line: parse, call one public function, render. No logic and no torch at import."""
