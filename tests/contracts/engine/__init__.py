"""What every engine must do, held against the scripted stand-in and against a real ComfyUI.

Both run as a process that the engine owns, with the same nodes. Here and in the tests of faults,
"rule" is what ComfyUI's ways ask of a client:

1. execution_success comes before history; only `executing` without a node comes after it
2. history and queue cannot be read as one: look again before a run is called lost
3. events go to the socket of the submitting client only: connect, await the hello, then submit
4. a client id that connects again is forgotten: a new one for each connection, then history
5. a prompt that is cached as a whole names the old file: a folder for each run
6. any prompt id is accepted, also a used one: a fresh one for each run
7. validation can fail in part and still answer 200
8. an interrupt is answered 200 whatever it does, and does not reach what waits: see the outcome
9. history keeps each graph in memory: delete what was used
10. folders are listed on ComfyUI's event loop: keep them empty
11. uploads of the same name are renamed: use the name that is returned
12. pictures are found by path: give the graph names in the run's own folder only
13. an animation is a batch: exactly one picture is expected
15. memory runs out as a node's error, or as a killed process
17. the success flag may be that of another prompt: the messages decide
"""
