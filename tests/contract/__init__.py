"""The promises that every rule must keep; each test is written once and runs for every rule."""
