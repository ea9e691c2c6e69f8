"""LiveCodeBench runs every solution behind these imports, so many solutions rely on them."""
# ruff: noqa: F401, F403, I001

from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import bisect, builtins, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator, random
import re, statistics, string, sys
