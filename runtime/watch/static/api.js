// What the page asks the server for. Reading only.

/** The answer to a request, as a value. Throws an Error that says what is wrong. */
export async function ask(path, parameters = {}) {
  const answer = await fetch(`/api/${path}?${new URLSearchParams(parameters)}`);
  if (!answer.ok) throw new Error(answer.status === 401 ? (await answer.text()).trim() : `${path}: ${answer.status}`);
  return answer.json();
}

/** Curves in a window: first and last step of each span, and by name its least, greatest and mean values. */
export const askCurves = (run, names, window, num) =>
  ask(`runs/${run}/curves`, { names: names.join(","), num, ...window });

/** Calls `take` with each summary that comes, `lost` with true when the server is away and with false when it is back. */
export function listen(take, lost) {
  const source = new EventSource("/api/stream");
  source.onmessage = (message) => { lost(false); take(JSON.parse(message.data)); };
  source.onerror = () => {
    lost(true);
    // A browser does not try again after an answer that is no stream.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => listen(take, lost), 3000);
  };
}
