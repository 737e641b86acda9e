"""The contract of every engine, tested on the scripted fake and on a real ComfyUI.

Both run as a process that the engine owns, with the same nodes. Here and in the tests of faults,
"rule" is a demand that ComfyUI's behaviour makes on a client:

1. execution_success comes before the history entry, and only `executing` without a node after it
2. history and queue cannot be read at once: look again before a run counts as lost
3. events go only to the socket of the submitting client: connect, await the hello, then submit
4. a client id that reconnects is forgotten: use a new one for each connection, then the history
5. a prompt that is cached as a whole names the old file: use a folder for each run
6. any prompt id is accepted, even a used one: use a fresh one for each run
7. validation can fail in part and still answer 200
8. an interrupt always answers 200, and does not reach queued prompts: check the outcome
9. the history keeps each graph in memory: delete used entries
10. folders are listed on ComfyUI's event loop: keep them empty
11. uploads with a used name are renamed: use the returned name
12. pictures are found by path: give the graph only names in the run's own folder
13. an animation is a batch: expect exactly one picture
15. a lack of memory appears as a node's error or as a killed process
17. the success flag may belong to another prompt: the messages decide
"""
