// What scrolls sideways in a box of its own must be reachable by keyboard.
"use strict";
(() => {
  const boxes = 'mjx-container[display="true"], div.math, .cell_output';
  function mark() {
    for (const box of document.querySelectorAll(boxes))
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
  addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    await document.fonts.ready;
    mark();
  });
  addEventListener("resize", mark);
})();
